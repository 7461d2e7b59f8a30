"""`python -m ds_zoadamu.plan`: `ds_zoadamu plan`, as the launcher takes it: `deepspeed --module ds_zoadamu.plan`."""

from ..cli import console

if __name__ == "__main__":
    console("plan")
