"""Export stage: write the trained SAE in the formats of other libraries, with a model card.

    export/sae.safetensors, sae.json     this project: `sae_core.load_sae(export)`
    export/saelens/                      SAELens 6
    export/sparsify/<hookpoint>/         sparsify
    export/dictionary_learning/          dictionary_learning
    export/README.md                     model card

There is one folder for each format in `formats.EXPORT_FORMATS` that can hold the SAE.

The weights are copied from the checkpoint in blocks of latents, so an export needs a few hundred
MiB of memory for an SAE of any size. Only this package and `sae_core/peer_formats.py` use the other
libraries' names for tensors and settings.
"""
