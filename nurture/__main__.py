"""`python -m nurture`, the same as `nurture`; what torchrun starts (`torchrun -m nurture run ...`)."""

from nurture.cli import main

if __name__ == "__main__":
    main()
