"""The durable record of series, analyses, objects and deliveries."""
