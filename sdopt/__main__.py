"""`python -m sdopt` is `sdopt`."""

from sdopt.cli import main

raise SystemExit(main())
