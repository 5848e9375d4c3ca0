"""The files beside weights: which may come along with a model, what they say, and where links among them may lead.

choice       which files of a folder are its model's weights
along        names of the files that may come along
links        symbolic links, and where they may lead
templates    chat templates in all their forms
cards        model cards as text, and sections cut out of them
paths        local paths in texts
front        the front matter of a card, field by field
plain_yaml   YAML of names and plain values
vocabulary   how many tokens a tokenizer has
making       how the output that is being written is made, for its record
"""
