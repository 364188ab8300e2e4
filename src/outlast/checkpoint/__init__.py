"""A checkpoint is sealed or not there: store, manifest, writer, removal, retention, space."""
