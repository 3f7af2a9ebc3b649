"""One file per architecture, composed of components; attribute names are the checkpoint's."""
