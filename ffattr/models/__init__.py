"""Everything that touches a user's model: what it is, what goes in, and what its layers leave in a forward pass.

In come a loaded model and what a user passes to it; out come a description of its layers (`LayerSpec`), the prepared
inputs, and a `LayerRecord` of each layer. Nothing of the model stays changed, also when an exception flies.

Read
    registry.py       which description a model has: built in, registered by a user, or found
    spec/             one layer as its modules, and the parameters read from them
    families/         families of transformers, as data
    detection/        layers of a model that nothing knows
    inputs/           text, images, sound and tensors, made ready
    capture/          one forward pass under hooks
    huggingface.py, family_layer.py, torch_encoder.py, torch_decoder.py   from that data, and from torch's own encoders
                         and decoders, to layers
    working_parts.py     which parts of a model that is refused are not
    pretrained.py, examples.py         models by name; a sentence, a picture or a tone for one
    verified.py       the record of how closely each family is reproduced
"""
