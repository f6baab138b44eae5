"""Every tracked source file is in the wheel, and nothing else is: subpackages and templates are easily left out."""

import subprocess
import sys
import zipfile

FOLDERS = {
    "geomssl/": "geomssl/",
    "probes/": "geomssl/probes/",
    "reports/": "geomssl/reports/",
    "examples/": "geomssl/recipes/",
}

tracked = subprocess.run(["git", "ls-files", *FOLDERS], check=True, capture_output=True, text=True).stdout.split()
wanted = set()
for path in tracked:
    folder = next(f for f in FOLDERS if path.startswith(f))
    wanted.add(FOLDERS[folder] + path.removeprefix(folder))
with zipfile.ZipFile(sys.argv[1]) as wheel:
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
for name in sorted(wanted - found):
    print(f"not in the wheel: {name}")
for name in sorted(found - wanted):
    print(f"not tracked: {name}")
print(f"{len(found)} files in the wheel, {len(wanted)} tracked")
sys.exit(found != wanted)
