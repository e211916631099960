"""``uenvctl completion``: print the completion script of a shell. The scripts only ask ``uenvctl __complete``; `complete` knows the answers."""

from __future__ import annotations

from collections.abc import Sequence

from uenvd.ctl import output
from uenvd.ctl.arguments import parse
from uenvd.errors import UsageError

HELP = """\
usage: uenvctl completion bash|zsh|fish

Print the completion script of a shell. Commands, options, labels and views are completed; labels come from what uenvd
remembers of the registry, so that it takes a few milliseconds. Packages install the scripts; without one, put it there:

examples:
  uenvctl completion bash > ~/.local/share/bash-completion/completions/uenvctl
  uenvctl completion zsh > ~/.zfunc/_uenvctl        with fpath=(~/.zfunc $fpath) before compinit in ~/.zshrc
  uenvctl completion fish > ~/.config/fish/completions/uenvctl.fish
"""

OPTIONS: dict[str, bool] = {}
TAKES = ("shell",)

BASH = r"""# bash completion for uenvctl. Written by: uenvctl completion bash
_uenvctl() {
    local IFS=$'\n' reply
    COMPREPLY=()
    # The line goes as it is: bash has split it at ':' and '=', which belong to labels and options.
    reply=$(uenvctl __complete bash "${COMP_LINE:0:COMP_POINT}" "${COMP_WORDS[COMP_CWORD]}" 2>/dev/null) || return
    case ${reply%%$'\n'*} in
        files) compopt -o default; return ;;
        command)
            if declare -F _command_offset >/dev/null; then
                local at
                for ((at = 1; at < COMP_CWORD; at++)); do
                    [ "${COMP_WORDS[at]}" != -- ] || { _command_offset $((at + 1)); return; }
                done
            fi
            COMPREPLY=($(compgen -c -- "${COMP_WORDS[COMP_CWORD]}"))
            compopt -o default
            return ;;
        part) compopt -o nospace ;;
    esac
    [ "$reply" = "${reply#*$'\n'}" ] || COMPREPLY=(${reply#*$'\n'})
}
complete -F _uenvctl uenvctl
"""

ZSH = r"""#compdef uenvctl
# zsh completion for uenvctl. Written by: uenvctl completion zsh
_uenvctl() {
    local -a reply values shown
    local line kind
    reply=("${(@f)$(uenvctl __complete zsh "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    kind=$reply[1]
    case $kind in
        files) _files; return ;;
        command)
            local -i at=${words[(i)--]}
            if (( at < CURRENT )); then
                shift $at words
                (( CURRENT -= at ))
                _normal
            else
                _command_names -e
            fi
            return ;;
    esac
    for line in "${(@)reply[2,-1]}"; do
        values+=("${line%%$'\t'*}")
        shown+=("${line/$'\t'/  -- }")
    done
    (( $#values )) || return 1
    if [[ $kind == part ]]; then
        compadd -Q -S '' -l -d shown -- "${values[@]}"
    else
        compadd -Q -l -d shown -- "${values[@]}"
    fi
}
if [[ $funcstack[1] == _uenvctl ]]; then
    _uenvctl "$@"
else
    compdef _uenvctl uenvctl
fi
"""

FISH = r"""# fish completion for uenvctl. Written by: uenvctl completion fish
function __uenvctl_complete
    set -l before (commandline -opc)
    set -l now (commandline -ct)
    set -l reply (uenvctl __complete fish $before[2..] "$now" 2>/dev/null)
    switch "$reply[1]"
        case files
            __fish_complete_path "$now"
        case command
            __fish_complete_command
            __fish_complete_path "$now"
        case '*'
            if set -q reply[2]
                printf '%s\n' $reply[2..]
            end
    end
end
complete -c uenvctl -f -a '(__uenvctl_complete)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    arguments = parse(argv, command="completion", options=OPTIONS, words=(1, 1))
    if "--help" in arguments.flags:
        print(HELP, end="")
        return 0
    shell = arguments.words[0]
    if shell not in SCRIPTS:
        raise UsageError(f"there is no completion for '{shell}'", hint="for bash, zsh and fish")
    output.data(SCRIPTS[shell].rstrip("\n"))
    return 0
