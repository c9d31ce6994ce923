"""Ray: placement, actors, supervision. The only package that imports ray."""
