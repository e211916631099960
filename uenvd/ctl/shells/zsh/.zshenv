# zsh of a session begins here ($ZDOTDIR); the user's own files are read from where they were.

_uenvd_zdotdir=$ZDOTDIR
if [[ -n ${UENVCTL_ZDOTDIR+x} ]]; then ZDOTDIR=$UENVCTL_ZDOTDIR; else unset ZDOTDIR; fi
unset UENVCTL_ZDOTDIR
if [[ -r ${ZDOTDIR-$HOME}/.zshenv ]]; then . "${ZDOTDIR-$HOME}/.zshenv"; fi
# .zshenv may have set it
if [[ -n ${ZDOTDIR+x} ]]; then _uenvd_own_zdotdir=$ZDOTDIR; fi
if [[ -o interactive ]]; then ZDOTDIR=$_uenvd_zdotdir; fi
