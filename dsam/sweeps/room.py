"""Where a sweep's runs go: how many each device takes at once, and how many it has."""

import os
from collections import Counter
from dataclasses import dataclass

from ..config import Config, Launcher, on_device
from ..cpus import cpus
from ..kinds import MOST_AT_ONCE
from ..text import counted


def at_once(in_use: int, total: int, cores: int, devices: int) -> int:
    """How many runs each of so many `devices` takes at once: as many as fit its `total` bytes where each needs what was
    `in_use` with one, and no more than leave each run on all devices one of the `cores`; 1 at least."""
    return max(1, min(total // max(1, in_use), cores // devices, MOST_AT_ONCE))


def placed(config: Config, device: str) -> Config:
    """The configuration of a run on that device, which is the only one that this process sees from here on."""
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    # device.name=auto would take the CPU where that device is not to be had.
    return on_device(config, "cuda") if config.device.name == "auto" else config


@dataclass
class Place:
    """What a run has of a device, which is None for whatever is there."""

    device: str | None
    taken: int
    most: int  # runs that the device took at once when this one began


class Room:
    """The launcher's devices, each with room for so many runs at once.

    With `launcher.per_device=auto` that is one, until a run has ended there and told what of the memory was in use.
    """

    def __init__(self, launcher: Launcher):
        self.most = Counter(launcher.slots)
        self.auto = launcher.devices is not None and launcher.per_device == "auto"
        self._taken: Counter[str | None] = Counter()
        self._untold = set(launcher.devices or ()) if self.auto else set()

    def take(self, alone: bool = False) -> Place | None:
        """A place on the device that has the fewest runs; all of an empty one, to be `alone` there. None where there
        is none: `leave` gives it back."""
        free = [device for device, most in self.most.items() if self._taken[device] < (1 if alone else most)]
        if not free:
            return None
        device = min(free, key=lambda device: self._taken[device])
        most = self.most[device]
        place = Place(device, most if alone else 1, most)
        self._taken[device] += place.taken
        return place

    def leave(self, place: Place) -> None:
        self._taken[place.device] -= place.taken

    def learn(self, place: Place, memory: dict[str, int] | None) -> str:
        """Takes up what a run that had `place` says of its device's memory ("in_use" at its end and "total", bytes),
        where that decides how many run there: returns a line that says so, or nothing."""
        if memory is None or place.device not in self._untold:
            return ""
        self._untold.remove(place.device)
        number = self.most[place.device] = at_once(memory["in_use"], memory["total"], cpus(), len(self.most))
        return (
            f"device {place.device}: {memory['in_use'] / 1e9:.1f} of {memory['total'] / 1e9:.1f} GB were in use with "
            f"one run, and there are {counted(cpus(), 'core')} for {counted(len(self.most), 'device')}: "
            f"{counted(number, 'run')} at once from here on"
        )

    def lower(self, place: Place) -> str:
        """After a run that found too little memory beside others. Says what changes; a number that was given stays."""
        if not self.auto:
            return ""
        self.most[place.device] = max(1, self.most[place.device] - 1)
        return f", and that takes {self.most[place.device]} at once from here on"
