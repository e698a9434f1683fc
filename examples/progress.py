"""A progress bar: tqdm's where it is installed, a line now and then where it is not."""

import sys

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

LINES = 10  # without tqdm


class Progress:
    """Call it once a step with the step's loss."""

    def __init__(self, title: str, steps: int) -> None:
        self.title, self.steps, self.done = title, steps, 0
        self.bar = tqdm(total=steps, desc=title, unit="step", mininterval=0.5) if tqdm else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, loss: float) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            self.bar.update()
        elif self.done % max(1, self.steps // LINES) == 0:
            print(f"{self.title}: step {self.done}/{self.steps}, loss {loss:.3f}", file=sys.stderr, flush=True)
