"""Everything that knows diffusers: its quantizer, its pipelines, and the families of its backbones."""
