"""What pyproject.toml cannot say: recipes/ stands at the top for readers and is installed inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nurture", "nurture.*"]), "nurture.recipes"],
    package_dir={"nurture.recipes": "recipes"},
    package_data={
        "nurture": ["py.typed", "templates/*.jinja", "studio/web/*"],
        "nurture.recipes": ["*.yaml"],
    },
)
