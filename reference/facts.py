"""How the readings of original layouts look up what a publisher's settings say, and say what does not fit."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


def first(*values: Any) -> Any:
    """The first that is told."""
    return next((v for v in values if v is not None), None)


def fact(
    name: str, hf_name: str, params: Mapping[str, Any], overrides: Mapping[str, Any], default: Any = None
) -> Any:
    """The user's word before that of params.json, under the publisher's name or that of Hugging Face."""
    found = first(overrides.get(hf_name), params.get(name), params.get(hf_name), default)
    if found is None:
        raise ValueError(f"expected `{name}` in params.json or `{hf_name}` given by name, found neither")
    return found


def settings(told: Mapping[str, Any], decided: Container[str] = ()) -> Mapping[str, Any]:
    """`told` in the names of transformers 4: 5 keeps theta and scaling in `rope_parameters`. ValueError for
    two values of theta, unless it is among what the user `decided`, and for a scaling without its kind."""
    newer = told.get("rope_parameters")
    for found in (newer, told.get("rope_scaling")):
        if found and "rope_scaling" not in decided:
            kindless(found)
    if newer is None:
        return told
    inner, scaled = newer.get("rope_theta"), newer.get("rope_type", "default") != "default"
    if "rope_theta" not in decided:
        one_of({"rope_theta": told.get("rope_theta"), "its object's": inner}, "rope_theta", "its object's")
    return {"rope_theta": inner, "rope_scaling": newer if scaled else None, **told}


def kindless(scaling: Mapping[str, Any]) -> None:
    """ValueError for values of a scaling of which nothing says what they do."""
    others = {k for k, v in scaling.items() if v is not None} - {"rope_theta", "partial_rotary_factor"}
    if others and not others & {"rope_type", "type"}:
        raise ValueError(f"expected rope_type beside {', '.join(sorted(others))}, found none")


def opened(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Some exports nest the settings in `model`. ValueError for one that has another value beside it."""
    inner = params.get("model")
    if not isinstance(inner, Mapping):
        return params
    for name, told in inner.items():
        one_of({f"model.{name}": told, name: params.get(name)}, f"model.{name}", name)
    return {**inner, **{k: v for k, v in params.items() if k != "model"}}


def one_of(params: Mapping[str, Any], *names: str) -> Any:
    """What the settings say under any of the names; ValueError where two of them say two things."""
    told = {name: params[name] for name in names if params.get(name) is not None}
    values = list(told.values())
    if any(v != values[0] for v in values[1:]):
        raise ValueError(f"expected one value, found {', '.join(f'{k} {v}' for k, v in told.items())}")
    return values[0] if values else None


def strange(params: Mapping[str, Any], names: Container[str]) -> Iterator[str]:
    """Settings that are on, and that no reading of these models knows: each may change what is computed."""
    for name, told in params.items():
        if name not in names and told is not None and told not in (False, 0, "", [], {}):
            yield f"expected settings that are known, found `{name}` {told}"


def only(facts: Mapping[str, Any], computed: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    """What is told and is of another model; no values at all stand for a fact that may not be told."""
    for name, values in computed.items():
        told = facts.get(name)
        if told is not None and told not in values:
            yield f"expected {f'`{name}` {values[0]}' if values else f'no `{name}`'}, found {told}"


def known(name: str, facts: Mapping[str, Any], values: Mapping[str, str]) -> str:
    """What `values` make of a fact. ValueError for one that they do not have."""
    found = str(facts.get(name))
    if found in values:
        return values[found]
    raise ValueError(f"expected `{name}` to be one of {', '.join(values)}, found {found}")


def disagreements(sizes: Mapping[str, int], told: Mapping[str, Any]) -> Iterator[str]:
    """Where a size of the tensors is not what is told of it; None is nothing told."""
    for size, found in sizes.items():
        if told.get(size) is not None and int(told[size]) != found:
            yield f"expected {size} {told[size]}, as told, found {found} in the tensors"


def refuse(problems: Iterator[str] | list[str]) -> None:
    if found := list(problems):
        raise ValueError("; ".join(found))
