"""Maps each top-level folder X to the package triptych.X; everything else is in pyproject.toml.

`triptych` itself is a namespace package, so that no folder of that name is needed at the top level.
"""

from setuptools import find_packages, setup

ROOMS = ["launcher", "parallel", "models", "kernels", "data_pipeline", "training", "tools", "configs"]

setup(
    package_dir={f"triptych.{room}": room for room in ROOMS},
    packages=[
        name
        for room in ROOMS
        for name in [f"triptych.{room}", *(f"triptych.{room}.{sub}" for sub in find_packages(room))]
    ],
    package_data={"triptych.configs": ["**/*.yaml"]},
)
