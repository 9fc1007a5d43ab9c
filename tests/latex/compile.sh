#!/usr/bin/env bash
# Compiles FOLDER/document.tex to document.pdf and document.txt, for the tests: tests/latex/compile.sh FOLDER
#
# Installs LaTeX and pdftotext by apt where they are missing, once per machine; status 77 where that is impossible.
set -euo pipefail
cd "$1"
if ! { command -v pdflatex && command -v pdftotext && kpsewhich booktabs.sty; } >install.log; then
  exec 9>/tmp/dsam-latex-install.lock
  flock 9 # two tests at once: apt takes one
  if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -o DPkg::Lock::Timeout=600 -y \
    --no-install-recommends texlive-latex-base texlive-latex-recommended poppler-utils; } \
    </dev/null >>install.log 2>&1; then
    echo "LaTeX is not here and cannot be installed: $(tail -n 1 install.log)"
    exit 77
  fi
  exec 9>&-
fi
pdflatex -interaction=nonstopmode -halt-on-error document.tex
pdftotext -layout document.pdf document.txt
