"""The studio: every stage of a run behind an OpenAI-compatible API, and a web page to feel what each one changed.

Read in this order: `library` (which models there are, by what names), `batcher` (one thread computes for everybody),
`text` (tokens to text for a client), `openai` (the API), `inspect`, `watch`, `label`, `play` (what the pages ask for),
`guard` (who may ask), `server` (all of it as one application). The pages are plain files in `web/`.
"""
