"""A progress bar: tqdm's where it is installed, a line now and then where it is not."""

import sys

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

LINES = 10  # without tqdm


class Progress:
    """Call it once a step with a figure to show: the step's loss, unless named otherwise."""

    def __init__(self, title: str, steps: int, unit: str = "step", figure: str = "loss") -> None:
        self.title, self.steps, self.unit, self.figure = title, steps, unit, figure
        self.done = 0
        self.bar = tqdm(total=steps, desc=title, unit=unit, mininterval=0.5) if tqdm else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, value: float) -> None:
        self.done += 1
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        if self.bar is not None:
            self.bar.set_postfix({self.figure: shown}, refresh=False)
            self.bar.update()
        elif self.done % max(1, self.steps // LINES) == 0:
            done = f"{self.title}: {self.unit} {self.done}/{self.steps}, {self.figure} {shown}"
            print(done, file=sys.stderr, flush=True)
