"""Label files of other tools, to and from COCO: what each can hold is kept, the rest is counted."""
