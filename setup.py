"""The three source folders become one package: pipelines/ and schedulers/ install inside diffusers_ext."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Each lower bound is the oldest version that the test suite was run on, all of them together, on Python 3.10; that of
# huggingface_hub is the oldest that transformers 5.0.0 takes. Tests of what these versions cannot do are skipped there
# with a reason: the guiders of modular pipelines that diffusers 0.37 does not have, and some offloading and compiling.
BASE = [
    "diffusers>=0.37.0",
    "transformers>=5.0.0",
    "accelerate>=1.3.0",
    "torch>=2.6.0",
    "safetensors>=0.5.0",
    "numpy>=1.26.0",
    "pillow>=10.1.0",
    "huggingface_hub>=1.3.0",
    "pyyaml>=6.0.0",
    "jinja2>=3.1.0",  # which torch takes as well
    "click>=8.4.0",
    "rich>=14.3.0",  # a bar that is disabled prints nothing
    "filelock>=3.32.0",  # the oldest with a hook for the acquired lock; tested apart from the others
]
METRICS = ["scikit-learn>=1.5.0", "faiss-cpu>=1.9.0.post1"]
PLOTS = ["matplotlib>=3.8.0"]
ODE = ["torchdiffeq>=0.2.5"]
# gradio is tested with this version alone, which takes no pillow 13 and no huggingface_hub before 1.16: the oldest
# versions above were tested without the app. playwright 1.51 is the oldest that the app's tests can be written for.
APP = ["gradio>=6.31.0", *PLOTS]
TOOLS = [
    "pytest>=8.0.0",
    "hypothesis>=6.100.0",
    "ruff>=0.17.5",
    "build>=1.2.1",
    "playwright>=1.51.0",
    "pytest-xdist>=3.6.1",
    "kornia>=0.8.2",  # diffusers' FrequencyDecoupledGuidance takes it
    "scipy>=1.13.0",  # of diffusers' schedulers with beta sigmas
]
DOCS = ["mkdocs-material>=9.7.0", "mkdocstrings[python]>=1.0.0"]
TEST = [*TOOLS, *METRICS, *ODE, *APP]

setup(
    name="diffusers_ext",
    version="0.1.0.dev0",
    description="Research methods for diffusers: Boost-and-Skip, guidance interval, discrete and flow methods",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["diffusers_ext", "diffusers_ext.*"]),
        "diffusers_ext.pipelines",
        "diffusers_ext.schedulers",
    ],
    package_dir={"diffusers_ext.pipelines": "pipelines", "diffusers_ext.schedulers": "schedulers"},
    package_data={"diffusers_ext": ["assets/**/*", "demo/*.css", "demo/*.jinja"]},
    install_requires=BASE,
    extras_require={
        "metrics": METRICS,
        "plots": PLOTS,
        "ode": ODE,
        "app": APP,
        "xformers": ["xformers"],
        "fid": ["torch-fidelity"],
        "test": TEST,
        "docs": DOCS,
    },
    entry_points={"console_scripts": ["diffusers-ext = diffusers_ext.cli:main"]},
)
