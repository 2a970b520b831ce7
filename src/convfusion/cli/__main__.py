"""`python -m convfusion.cli`."""

from convfusion.cli import main

main()
