"""What the settings say of methods and their models: names that are installed, objects they make, roles they have.

Each check yields the place in the settings, what is wrong there, and how to fix it. To look a method up imports no
network, so settings stay cheap to check.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from models.registry import BundleError, load_bundle
from node.methods import registry
from node.results.forms import kinds_of

if TYPE_CHECKING:
    from node.config import Route, Settings

#: Keys and indices from the top of the settings.
Location = tuple[int | str, ...]

#: The place, what is wrong, and how to fix it.
Found = tuple[Location, str, str]


def nearest(word: str, words: Iterable[str]) -> str:
    """A question that names the word most like this one; empty where none is like it."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else ""


def of_route(settings: Settings, n: int, route: Route) -> Iterator[Found]:
    """A route's method is installed and makes what the route sends; imports no method but that one."""
    method, problem = _method(route.analysis)
    if method is None:
        near = nearest(route.analysis, registry.names())
        hint = near or f"Install the package of the method, or name one of {', '.join(registry.names())}."
        yield ("routes", n, "analysis"), problem, hint
        return
    makes = kinds_of(method.segmentations)
    known = ", ".join(f"'{kind}'" for kind in makes)
    for name, kinds in route.to.items():
        for m, kind in enumerate(kinds):
            if kind not in makes:
                what = f"'{kind}' is no object of the method {route.analysis}, which makes {known}"
                yield ("routes", n, "to", name, m), what, nearest(kind, makes) or f"Name one of {', '.join(makes)}."


def of_peers(settings: Settings) -> Iterator[Found]:
    """What peers take is an object of some method: of the default one and those that routes name, else of any."""
    used = {registry.DEFAULT, *(route.analysis for route in settings.routes)}
    makes = _made_by(used)
    for name, peer in settings.peers.items():
        for n, kind in enumerate(peer.takes or ()):
            if kind not in makes and kind not in (makes := makes | _made_by(registry.names())):
                hint = nearest(kind, sorted(makes)) or f"Name one of {', '.join(sorted(makes))}."
                yield ("peers", name, "takes", n), f"'{kind}' is no object of any method here", hint


def of_models(settings: Settings) -> Iterator[Found]:
    """Models are named for roles that their method has."""
    for key, value in settings.models.items():
        at: Location = ("models",) if isinstance(value, str) else ("models", key)
        method, problem = _method(registry.DEFAULT if isinstance(value, str) else key)
        if method is None:
            yield at, problem, nearest(key, registry.names()) or f"Known here: {', '.join(registry.names())}."
            continue
        for role in (key,) if isinstance(value, str) else value:
            if role not in method.roles:
                hint = nearest(role, method.roles) or f"Known here: {', '.join(method.roles)}."
                yield (*at, role), f"the method {method.name} needs no model '{role}'", hint


def of_bundles(settings: Settings) -> Iterator[Found]:
    """Models that the settings name, and the default ones of the routes' methods, are there and have their roles."""
    names = sorted({*(route.analysis for route in settings.routes), *_methods_with_models(settings)})
    for method in (registry.find(name) for name in names):
        named = settings.models_for(method.name)
        own = settings.models.get(method.name, {})
        for role, wanted in method.roles.items():
            flat = role in named and role not in own
            location: Location = ("models", role) if flat else ("models", method.name, role)
            try:
                wanted.require(load_bundle(named.get(role, wanted.default), settings.installed_models))
            except BundleError as error:
                hint = f"Name a model of {wanted.finds}; `lungnode models list` shows what each is for."
                yield location, str(error), hint


def _methods_with_models(settings: Settings) -> set[str]:
    return {registry.DEFAULT if isinstance(value, str) else key for key, value in settings.models.items()}


def _made_by(names: Iterable[str]) -> set[str]:
    """Kinds of object of these methods, as far as they are installed."""
    methods = (_method(name)[0] for name in names)
    return {kind for method in methods if method is not None for kind in kinds_of(method.segmentations)}


def _method(name: str) -> tuple[registry.Method | None, str]:
    """A method, or None and why there is none."""
    try:
        return registry.find(name), ""
    except registry.MethodError as error:
        return None, str(error)
