"""Files of an installation: where they lie and how long they are kept."""
