"""From a conversation to `input_ids` and `labels`: one render, one tokenization.

How a line break beside an image is written
===========================================

A LLaVA row marks an image by `<image>` inside the text of a human turn. In `messages` the image is an item of its own
and **the line break beside it is written by the chat template, never stored**:

    row                                           messages (content of the user turn)
    "<image>\\nWhat is this?"                      [image] [text "What is this?"]
    "What is this?\\n<image>"                      [text "What is this?"] [image]
    "<image>\\n   What is this?  "                 [image] [text "What is this?"]
    "<image>"                                     [image]
    "Compare <image> with <image>, please."       [text "Compare "] [image] [text " with "] [image] [text ", please."]
    "No picture   here. "                         [text "No picture   here. "]

Row → messages, for a human turn that holds markers: cut the text at every marker; strip the white space at the two ends
of the turn (left of its first text piece, right of its last); drop pieces that are empty; keep everything else,
also white space inside, as it is. A turn without a marker, and every answer, is kept to the letter.

Messages → text, by every template of ours, for a user turn that holds images:

* default: the images come first, each followed by one line break, then the joined text pieces, stripped. No line break
  follows when there is no text. This is what the original's `preprocess_multimodal` did with every turn, so "image after
  text" gives the same tokens as "image before text" (the field `normalised` of the golden files).
* with the template variable `keep_image_order=True` (`encode_conversation(..., keep_image_order=True)`,
  `apply_chat_template(..., keep_image_order=True)`): the items stay in their order. One line break is written between an
  image and its neighbour, unless a neighbouring text already has one on that side; two texts are joined as they are. The
  paper's first turn (LLaVA §4.1: question and image in random order) is rendered so.

A user turn without images, and every answer, is rendered to the letter.
"""
