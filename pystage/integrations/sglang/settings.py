"""The plugin's settings, from environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...pool import AtCapacity, Issue

ENVIRONMENT = {
    "enabled": "PYSTAGE_SGLANG",
    "capacity_mib": "PYSTAGE_SGLANG_CAPACITY_MIB",
    "at_capacity": "PYSTAGE_SGLANG_AT_CAPACITY",
    "issue": "PYSTAGE_SGLANG_ISSUE",
    "validate_ids": "PYSTAGE_SGLANG_VALIDATE_IDS",
    "sizer": "PYSTAGE_SGLANG_SIZER",
    "budget_ms": "PYSTAGE_SGLANG_BUDGET_MS",
    "correct": "PYSTAGE_SGLANG_CORRECT",
    "small": "PYSTAGE_SGLANG_SMALL",
    "cpu": "PYSTAGE_SGLANG_CPU",
}


@dataclass(frozen=True)
class Settings:
    """The plugin's settings, one environment variable each (``ENVIRONMENT``).

    Attributes:
        enabled: if False, the plugin hooks nothing.
        capacity_mib: limit on the pinned memory of each process, in MiB.
        at_capacity: what happens if the limit is reached and no slot is free. ``"fallback"``: the
            batch uses torch's own pinned memory, and is counted. ``"wait"``: staging waits up to a
            second for a slot, then SGLang stages the batch. ``"raise"``: the scheduler stops with
            :class:`pystage.PoolExhaustedError`.
        issue: ``"deferred"``: the transfer is a kernel on the forward stream. ``"eager"``: the
            transfer starts at once on a stream of the pool, and the forward stream waits for it.
        validate_ids: refuse a text request with an id outside the vocabulary when it arrives.
        sizer: use pystage's profiler and chunk sizer (``pystage.pp``) instead of SGLang's.
        budget_ms: limit on the predicted time of a batch that holds prefills, in ms. 0: no limit.
        correct: keep the latency model of ``sizer`` and ``budget_ms`` accurate with the times of
            the batches that run.
        small: send a batch's lengths, indices and sampling parameters to the device together, as
            the parameters of one kernel, and write the rows of its KV indices with another kernel.
        cpu: also stage batches of ``--device cpu``. This is for tests: SGLang alone is faster.
    """

    enabled: bool = True
    capacity_mib: int = 64
    at_capacity: AtCapacity = "fallback"
    issue: Issue = "deferred"
    validate_ids: bool = False
    sizer: bool = False
    budget_ms: int = 0
    correct: bool = False
    small: bool = True
    cpu: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Reads the settings from environment variables.

        Raises:
            ValueError: a variable has an invalid value. The message names the variable, its value
                and the valid values.
        """
        given: dict[str, Any] = {}
        for setting in fields(cls):
            variable = ENVIRONMENT[setting.name]
            text = environment.get(variable, "").strip().lower()
            if text:
                given[setting.name] = _parse(variable, text, setting.default)
        return cls(**given)


_CHOICES = {
    "PYSTAGE_SGLANG_AT_CAPACITY": ("fallback", "wait", "raise"),
    "PYSTAGE_SGLANG_ISSUE": ("deferred", "eager"),
}

_UNITS = {"PYSTAGE_SGLANG_CAPACITY_MIB": "MiB", "PYSTAGE_SGLANG_BUDGET_MS": "ms"}


def _parse(variable: str, text: str, default: object) -> bool | int | str:
    if isinstance(default, bool):
        if text in ("0", "1"):
            return text == "1"
        raise ValueError(f"{variable} is {text!r}, but must be 0 or 1")
    if isinstance(default, int):
        if text.isascii() and text.isdigit() and 1 <= int(text) <= 1 << 20:
            return int(text)
        raise ValueError(
            f"{variable} is {text!r}, but must be a number of {_UNITS[variable]} "
            f"from 1 to {1 << 20}"
        )
    if text not in _CHOICES[variable]:
        raise ValueError(
            f"{variable} is {text!r}, but must be one of {', '.join(_CHOICES[variable])}"
        )
    return text
