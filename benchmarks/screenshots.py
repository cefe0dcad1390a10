"""The README's pictures of Prefect, DVC and MLflow, as a browser shows their pages.

    fmn schedule &        # Prefect's server; then in the folder of a run:
    PREFECT_API_URL=http://127.0.0.1:4200/api fmn run
    dvc plots show; fmn mlflow &
    python -m benchmarks.screenshots \
        --prefect http://127.0.0.1:4200/runs/flow-run/ID --dvc dvc_plots/index.html \
        --mlflow "http://127.0.0.1:5000/#/models/fmn-quickstart/versions/1"
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from benchmarks.quickstart import PICTURES
from benchmarks.results import parser

BOXES = {"prefect": (0, 0, 1280, 700), "dvc": (190, 0, 1100, 780), "mlflow": (0, 0, 950, 760)}
"""What is shown of each page, in pixels from the left and the top."""
COLOURS = 96
PATIENCE = 30_000  # milliseconds of the page's own clock


def shoot(address: str, name: str) -> None:
    """Write the picture of a page."""
    if "://" not in address:
        address = Path(address).resolve().as_uri()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.png"
        command = [
            *("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--window-size=1280,900", f"--virtual-time-budget={PATIENCE}"),
            *(f"--screenshot={file}", address),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        with Image.open(file) as page:
            shown = page.convert("RGB").crop(BOXES[name]).quantize(COLOURS)
        shown.save(PICTURES / f"{name}.png", optimize=True)


def main() -> None:
    options = parser(__doc__)
    for name in BOXES:
        options.add_argument(f"--{name}", metavar="ADDRESS")
    addresses = {name: address for name, address in vars(options.parse_args()).items() if address}
    if not addresses:
        sys.exit(options.format_help())
    for name, address in addresses.items():
        shoot(address, name)


if __name__ == "__main__":
    main()
