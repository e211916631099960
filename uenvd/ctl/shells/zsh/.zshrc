# The user's .zshrc, then the session in the prompt; nothing of this is left to the shells that are started from here.

if [[ -n ${_uenvd_own_zdotdir+x} ]]; then ZDOTDIR=$_uenvd_own_zdotdir; else unset ZDOTDIR; fi
typeset +x UENVCTL_PROMPT
_uenvd_path=$PATH _uenvd_file='~/.zshrc'
if [[ -r ${ZDOTDIR-$HOME}/.zshrc ]]; then . "${ZDOTDIR-$HOME}/.zshrc"; fi
emulate sh -c '. "$_uenvd_zdotdir/../check.sh"'

_uenvd_prompt=$UENVCTL_PROMPT
unset UENVCTL_PROMPT _uenvd_zdotdir _uenvd_own_zdotdir
PROMPT=$_uenvd_prompt$PROMPT
# themes make the whole prompt anew each time
_uenvd_show() { [[ $PROMPT == "$_uenvd_prompt"* ]] || PROMPT=$_uenvd_prompt$PROMPT }
typeset -ga precmd_functions
precmd_functions+=(_uenvd_show)
