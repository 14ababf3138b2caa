"""`python -m raysweep`: what a Ray job runs when only the working directory is shipped."""

from raysweep.cli import main

if __name__ == "__main__":
    main()
