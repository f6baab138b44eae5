"""One vocabulary of transformations: batched, on the device, with explicit parameters and generators."""
