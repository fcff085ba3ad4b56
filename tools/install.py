"""Make .venv, keep the torch that is there, and install megad2v into it: what `make install` runs.

    python3 tools/install.py --venv .venv --torch torch==2.13.0 --extras dev,hf,speech,text

Runs on the bare interpreter: standard library only, in a syntax that Python 3.6 can read, to be told that it is old.
"""

import argparse
import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 10)

# What an interpreter sees. `site` are the folders that its packages come from.
SURVEY = """
import json, sys
from importlib import metadata
try:
    import torch
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        version = str(torch.__version__)
except Exception:
    version = None
swapped = None
try:
    import PIL
    metadata.version("Pillow")
except ImportError as error:
    if isinstance(error, metadata.PackageNotFoundError):
        swapped = PIL.__version__
print("\\n" + json.dumps({
    "prefix": sys.prefix, "in_venv": sys.prefix != sys.base_prefix,
    "torch": version, "other_pillow": swapped, "site": [path for path in sys.path if path.endswith("-packages")],
}))
"""

# A Python package that the kept torch's environment already holds (DeepSpeed, say) is not installed again, and so puts
# no script into our bin; the one beside it would start the other interpreter, which does not know megad2v.
DEEPSPEED_SCRIPT = """#!/bin/sh
'''exec' "$(dirname "$0")/python" "$0" "$@"
' '''
from deepspeed.launcher.runner import main

if __name__ == "__main__":
    main()
"""


def say(text):
    print("install: " + text, flush=True)


def fail(text):
    sys.stderr.write("install: error: " + text + "\n")
    sys.exit(2)


def survey(python):
    """What `python` sees, or None where it does not run."""
    try:
        output = subprocess.run([python, "-c", SURVEY], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/")
        return json.loads(output.stdout.decode().strip().splitlines()[-1]) if output.returncode == 0 else None
    except (OSError, ValueError, IndexError):
        return None


def check_interpreter():
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST:
        newer = "make install PYTHON=python3.11"
        fail("Python {}.{} or newer is needed, {} is {}; try: {}".format(*OLDEST, sys.executable, version, newer))
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        fail(
            "this Python has no venv (Debian and Ubuntu ship it apart); install it and call again: "
            "apt-get install python{}.{}-venv".format(*sys.version_info)
        )


def make_environment(path, python):
    """An environment that sees the torch to keep, and nothing of the system's packages where there is none to keep.

    With system packages in sight, any of them can stand in for what we test with: done for torch's sake only.
    One that works is kept, whichever Python made it; `make clean-all` comes before another PYTHON.
    """
    if survey(python) is not None and made_for(path):
        return
    ours = survey(sys.executable)
    say("making {} with Python {}.{}".format(os.path.relpath(path), *sys.version_info))
    flags = []
    if ours["torch"] is not None:
        say("torch {} imports in {}: the new environment will see it".format(ours["torch"], ours["prefix"]))
        flags = ["--system-site-packages"]
    if subprocess.run([sys.executable, "-m", "venv", "--clear", *flags, path]).returncode:
        fail("python -m venv failed (see above)")
    if ours["torch"] is not None and ours["in_venv"]:
        # We run in an environment, while --system-site-packages means the base interpreter's: name the folders.
        with open(os.path.join(own_packages(survey(python), path), "the_torch_we_keep.pth"), "w") as stream:
            stream.writelines(f"import site; site.addsitedir({entry!r})\n" for entry in ours["site"])


def made_for(path):
    """Whether it was made at this place: a copied or moved environment runs, but its scripts start the old one."""
    with open(os.path.join(path, "bin", "activate")) as stream:
        return path in stream.read()


def own_packages(seen, path):
    """The environment's own folder of packages, among all that its interpreter looks through."""
    return next(entry for entry in seen["site"] if os.path.realpath(entry).startswith(os.path.realpath(path) + os.sep))


def without_a_cache_if_need_be():
    """pip fails at the end of a build, not at its start, when it cannot make its cache (no usable home directory)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    cache = os.environ.get("PIP_CACHE_DIR") or os.path.join(base, "pip")
    try:
        os.makedirs(cache, exist_ok=True)
        usable = os.access(cache, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        say("pip's cache cannot be written, going without")
        os.environ["PIP_NO_CACHE_DIR"] = "1"


def pip(python, *words):
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    if subprocess.run(command + list(words), cwd=HERE).returncode:
        command.remove("--quiet")
        fail("pip failed (see above); it says more as: " + " ".join(command + list(words)))


def install_torch(python, requirement):
    """Returns the version that is there in the end."""
    there = survey(python)["torch"]
    if there is not None:
        say("keeping the installed torch " + there)
        return there
    say("installing " + requirement)
    if sys.platform.startswith("linux") and not os.path.exists("/dev/nvidiactl"):
        say("no NVIDIA device here; if this downloads gigabytes of CUDA, see docs/install.md for a CPU build")
    pip(python, *requirement.split())
    there = survey(python)["torch"]
    if there is None:
        fail(f"torch was installed but does not import: {os.path.relpath(python)} -c 'import torch' says why")
    return there


def stand_in_for_pillow(python, path):
    """Where pillow-simd provides PIL, note in .venv that Pillow is there, under the version that PIL says it is.

    pip knows names only: without the note, TensorBoard's requirement would lay Pillow over pillow-simd.
    """
    seen = survey(python)
    if seen["other_pillow"] is None:
        return
    say("keeping the installed replacement of Pillow, " + seen["other_pillow"])
    name = "pillow-{}.dist-info".format(seen["other_pillow"])
    folder = os.path.join(own_packages(seen, path), name)
    os.makedirs(folder, exist_ok=True)
    files = {
        "METADATA": "Metadata-Version: 2.1\nName: pillow\nVersion: {}\nSummary: stand-in, PIL is another's\n",
        "INSTALLER": "megad2v\n",
        "RECORD": "".join(f"{name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")),
    }
    for file, text in files.items():
        with open(os.path.join(folder, file), "w") as stream:
            stream.write(text.format(seen["other_pillow"]))


def install_package(python, path, extras, torch):
    """Editable, with extras; pip may not exchange the torch that is there for another one."""
    say(f"installing megad2v[{extras}]")
    stand_in_for_pillow(python, path)
    constraint = os.path.join(path, "torch-is-kept.txt")
    with open(constraint, "w") as stream:
        stream.write(f"torch=={torch}\n")
    # --use-pep517: isolated builds, also by the old pip that older Pythons bundle, which else wants `wheel` beside it.
    pip(python, "--use-pep517", "--constraint", constraint, "--editable", f".[{extras}]" if extras else ".")
    script = os.path.join(os.path.dirname(python), "deepspeed")
    if not os.path.exists(script):
        with open(script, "w") as stream:
            stream.write(DEEPSPEED_SCRIPT)
        os.chmod(script, 0o755)


def main():
    parser = argparse.ArgumentParser(description="Make .venv and install megad2v into it.")
    parser.add_argument("--venv", default=".venv")
    parser.add_argument("--torch", default="torch==2.13.0", help="words for pip, where no torch imports yet")
    parser.add_argument("--extras", default="dev,hf,speech,text")
    arguments = parser.parse_args()
    check_interpreter()
    path = os.path.abspath(arguments.venv)
    python = os.path.join(path, "bin", "python")
    without_a_cache_if_need_be()
    make_environment(path, python)
    torch = install_torch(python, arguments.torch)
    install_package(python, path, arguments.extras, torch)
    say(f"done; `. {os.path.relpath(path)}/bin/activate` to use it")


if __name__ == "__main__":
    main()
