"""What the pages say is what the results say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_measured_tables_are_those_of_the_results():
    command = [sys.executable, ROOT / "recipes" / "tables.py", "--check"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
