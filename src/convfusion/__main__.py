"""`python -m convfusion`."""

from convfusion.cli import main

main()
