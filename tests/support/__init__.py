"""What tests share: tiny worlds, servers, oracles, the replay of golden cases, and the tools that the Makefile runs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
