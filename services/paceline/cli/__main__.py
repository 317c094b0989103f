"""`python -m paceline.cli`: the same as `paceline`, for processes that start others."""

from paceline.cli import main

if __name__ == "__main__":
    main()
