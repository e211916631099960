# What an interactive bash of a session reads in place of ~/.bashrc: that file first. $_uenvd_prompt is what the prompt begins with.

export -n _uenvd_prompt
_uenvd_path=$PATH _uenvd_file='~/.bashrc'
if [ -r ~/.bashrc ]; then . ~/.bashrc; fi
. "${BASH_SOURCE[0]%/*}/check.sh"

PS1=$_uenvd_prompt$PS1
if [ -n "${PROMPT_COMMAND-}" ]; then
    # it may make the whole prompt anew each time
    _uenvd_show() { case $PS1 in "$_uenvd_prompt"*) ;; *) PS1=$_uenvd_prompt$PS1 ;; esac; }
    if [ "${BASH_VERSINFO[0]}${BASH_VERSINFO[1]}" -ge 51 ]; then
        PROMPT_COMMAND+=(_uenvd_show)
    else
        PROMPT_COMMAND="${PROMPT_COMMAND%;};_uenvd_show"
    fi
else
    unset _uenvd_prompt
fi
