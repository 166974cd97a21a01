"""What keeps the load small changes no result. benchmarks/load.py measures the load itself."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import load  # noqa: E402


def test_compare_needs_no_torch(tmp_path):
    load.write_runs(tmp_path, 2)
    words = ["compare", *(str(tmp_path / f"run{i}") for i in range(2)), "--out", str(tmp_path / "out")]
    code = f"import sys; from qlora_helpers.__main__ import main; sys.exit(main({words}) or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.md").exists()
