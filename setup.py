"""Which packages a wheel holds; everything else about the project is in pyproject.toml.

conf/ is installed as mtp_lightning/conf, and benchmarks/ and tests/ are not: packages of such
common names would be everybody's in site-packages.
"""

from setuptools import find_namespace_packages, setup

_INSTALLED = ["mtp_lightning*", "data_modules*", "sweeps*", "hydra_plugins*"]

setup(
    packages=[
        *find_namespace_packages(include=_INSTALLED),
        "mtp_lightning.conf",
        *(f"mtp_lightning.conf.{name}" for name in find_namespace_packages("conf")),
    ],
    package_dir={"mtp_lightning.conf": "conf"},
)
