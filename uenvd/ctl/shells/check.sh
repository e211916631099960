# Read by an interactive bash or zsh of a session after the user's own files. Says what these files hide of the session's view, and puts back
# what they threw out. $_uenvd_path is PATH as it was before them.

_uenvd_inside() { case ":$2:" in *":$1:"*) return 0 ;; esac; return 1; }

_uenvd_check() {
    # the view's directories of programs
    _uenvd_rest="${UENV_RESTORE-}|" _uenvd_view=
    while [ -n "$_uenvd_rest" ]; do
        case $_uenvd_rest in PATH=*)
            _uenvd_record=${_uenvd_rest%%'|'*}
            _uenvd_view="${_uenvd_record#PATH=}${_uenvd_view:+:$_uenvd_view}" ;;
        esac
        _uenvd_rest=${_uenvd_rest#*'|'}
    done
    [ -n "$_uenvd_view" ] || return 0

    _uenvd_lost= _uenvd_rest=$_uenvd_view:
    while [ -n "$_uenvd_rest" ]; do
        _uenvd_dir=${_uenvd_rest%%:*} _uenvd_rest=${_uenvd_rest#*:}
        _uenvd_inside "$_uenvd_dir" "$PATH" || _uenvd_lost=${_uenvd_lost:+$_uenvd_lost:}$_uenvd_dir
    done
    if [ -n "$_uenvd_lost" ]; then
        PATH=$_uenvd_lost:$PATH
        printf 'uenvctl: %s has removed %s from PATH; it was put back\n' "$_uenvd_file" "$_uenvd_lost" >&2
    fi

    # a program of a directory that these files put before the view's is used instead of the view's of that name
    _uenvd_hidden= _uenvd_count=0 _uenvd_seen=0 _uenvd_rest=$PATH:
    while [ -n "$_uenvd_rest" ]; do
        _uenvd_dir=${_uenvd_rest%%:*} _uenvd_rest=${_uenvd_rest#*:}
        _uenvd_inside "$_uenvd_dir" "$_uenvd_view" && { _uenvd_inside "${_uenvd_view##*:}" "$_uenvd_rest" && continue || break; }
        _uenvd_inside "$_uenvd_dir" "$_uenvd_path" && continue
        for _uenvd_program in "$_uenvd_dir"/*; do
            [ "$_uenvd_seen" -lt 5000 ] || break
            _uenvd_seen=$((_uenvd_seen + 1))
            _uenvd_views=$_uenvd_rest
            while [ -n "$_uenvd_views" ]; do
                _uenvd_other=${_uenvd_views%%:*} _uenvd_views=${_uenvd_views#*:}
                if _uenvd_inside "$_uenvd_other" "$_uenvd_view" && [ -x "$_uenvd_other/${_uenvd_program##*/}" ] && [ -x "$_uenvd_program" ]; then
                    _uenvd_count=$((_uenvd_count + 1))
                    [ "$_uenvd_count" -gt 4 ] || _uenvd_hidden=${_uenvd_hidden:+$_uenvd_hidden, }$_uenvd_program
                    break
                fi
            done
        done
    done
    if [ "$_uenvd_count" -gt 0 ]; then
        [ "$_uenvd_count" -le 4 ] || _uenvd_hidden="$_uenvd_hidden and $((_uenvd_count - 4)) more"
        printf 'uenvctl: %s puts other programs before those of the session: %s\n' "$_uenvd_file" "$_uenvd_hidden" >&2
        printf 'hint: have it change PATH only outside of sessions:  if [ -z "$UENV_MOUNT_LIST" ]; then ...; fi\n' >&2
    fi
    return 0
}

if [ "$PATH" != "$_uenvd_path" ]; then _uenvd_check; fi
unset -f _uenvd_check _uenvd_inside
unset _uenvd_rest _uenvd_view _uenvd_record _uenvd_lost _uenvd_dir _uenvd_hidden _uenvd_count _uenvd_seen
unset _uenvd_program _uenvd_views _uenvd_other _uenvd_path _uenvd_file
