"""`python -m sdopt` is `sdopt`."""

from sdopt.cli.main import main

raise SystemExit(main())
