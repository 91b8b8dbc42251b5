"""What the commands do, a module each; `libortho.cli.app` has their options."""
