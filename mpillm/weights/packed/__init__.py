"""The packed format: kernel-ready files, one for each layer, as `mpillm pack` writes them."""
