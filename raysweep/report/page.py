def build(folder):
    pass
