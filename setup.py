"""Build hook; everything else is in pyproject.toml."""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class NoWheel(bdist_wheel):
    """Refuses a built wheel; an editable install does not come by here."""

    def run(self) -> None:
        raise SystemExit(
            "error: regen-dist is not built as a wheel: it would lack configs/, and would install packages called "
            "`tools` and `launcher`, which break others. Install the checkout: pip install -e ."
        )


setup(cmdclass={"bdist_wheel": NoWheel})
