"""Released tokenizer files -> our state dicts and back; one adapter per registered tokenizer."""

from tokenizer.adapters import dar, fqgan, imagefolder, maskgit, rectok, titok

ADAPTERS = {
    "dar": dar.ADAPTER,
    "fqgan": fqgan.ADAPTER,
    "maskgit_vqgan": maskgit.MASKGIT,
    "vqgan_plus": maskgit.VQGAN_PLUS,
    "titok": titok.ADAPTER,
    "imagefolder": imagefolder.ADAPTER,
    "rectok": rectok.ADAPTER,
}
