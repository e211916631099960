"""The catalogue of a site's environments: a static web site, made from the registry alone."""
