"""Spans of time as people write them."""

import re


def seconds_of(text: str) -> float:
    """Seconds in "3600", "90s", "55m", "11h30m" or "2d". Raises ValueError."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    if re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    elif re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text):
        seconds = float(sum(int(count) * units[unit] for count, unit in re.findall(r"(\d+)([dhms])", text)))
    else:
        seconds = 0.0
    if seconds <= 0:
        raise ValueError(f"{text}: give seconds, such as 3600, or a time such as 55m, 11h30m or 2d")
    return seconds
