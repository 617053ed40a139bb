"""What is fitted answers by the parameters that it was fitted with."""

from __future__ import annotations

from typing import Any, ClassVar

from anomalib_lite._validation import alike
from anomalib_lite.errors import InvalidValueError

__all__ = ["FittedParameters"]


class FittedParameters:
    """Remembers the parameters of a fit, and refuses to go on with others."""

    # Parameters of how a run goes, and not of what it answers: they may change after a fit.
    _of_a_run: ClassVar[frozenset[str]] = frozenset(
        {
            *("batch_size", "max_pixels", "memory_budget", "n_jobs", "on_error", "random_state"),
            *("maps", "verbose"),
        }
    )
    fitted_with_: dict[str, Any]  # the other ones, and those of the detectors among them

    def _remember_parameters(self) -> None:
        """Note what this is fitted with."""
        given: dict[str, Any] = self.get_params()  # type: ignore[attr-defined]
        free = self._of_a_run
        self.fitted_with_ = {n: v for n, v in given.items() if n.split("__")[-1] not in free}

    def _refuse_changes(self, *allowed: str) -> None:
        """Raise InvalidValueError if a parameter is no longer what it was in the fit."""
        given: dict[str, Any] = self.get_params()  # type: ignore[attr-defined]
        for name, then in self.fitted_with_.items():
            if name in allowed or alike(then, now := given.get(name)):
                continue
            back = "Set it back"
            if name == "false_alarm_rate" and hasattr(self, "set_false_alarm_rate"):
                back += f", call set_false_alarm_rate({now!r})"
            raise InvalidValueError(
                f"{type(self).__name__}: {name} must stay as it was in fit, {_short(then)}, "
                f"got {_short(now)}: what was learned would not fit it. {back}, or call fit."
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
