"""Completion scripts for shells, made from the settings."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from tl_keras.config.flags import GENERAL
from tl_keras.config.settings import MODES, PATHS_OR_SOURCES, list_fields
from tl_keras.errors import UserError

_COMPLETION = ("completion", "print the completion script of a shell")
_SHELLS = ("bash", "zsh", "fish")
_FISH = """\
# tl_keras completion for fish: tl_keras completion fish | source
function __tl_keras_mode_is
    set -l words (commandline -opc)
    for mode in $argv
        contains -- $mode $words; and return 0
        contains -- --mode=$mode $words; and return 0
    end
    return 1
end
complete -c tl_keras -f"""
_BASH = """\
# tl_keras completion for bash: source <(tl_keras completion bash)
_tl_keras() {{
    local line="${{COMP_LINE:0:COMP_POINT}}"
    local current="${{line##* }}" mode="${{COMP_WORDS[1]}}" words
    COMPREPLY=()
    if [[ "$line" =~ ^[^\\ ]+\\ +[^\\ ]*$ && "$current" != -* ]]; then
        COMPREPLY=($(compgen -W "{modes} completion" -- "$current"))
        return
    fi
    if [[ "$line" =~ ^[^\\ ]+\\ +completion\\  ]]; then
        COMPREPLY=($(compgen -W "{shells}" -- "$current"))
        return
    fi
    [[ "$line" =~ --mode[=\\ ]([a-z]+) ]] && mode="${{BASH_REMATCH[1]}}"
    case "$current" in
{choices}
        {paths}) COMPREPLY=($(compgen -f -- "${{current#*=}}")); return ;;
        --*=*) return ;;
    esac
    case "$mode" in
{flags}
        *) words="--mode= {general}" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    [[ ${{#COMPREPLY[@]}} -eq 1 && "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace
}}
complete -F _tl_keras tl_keras
"""

_ZSH = """\
#compdef tl_keras
# tl_keras completion for zsh: source <(tl_keras completion zsh)
_tl_keras() {{
    local mode=${{words[2]}} word
    local -a modes
    modes=({modes})
    if (( CURRENT == 2 )) && [[ $mode != -* ]]; then
        _describe mode modes
        return
    fi
    for word in $words; do
        [[ $word == --mode=* ]] && mode=${{word#--mode=}}
    done
    case $mode in
{flags}
        completion) _arguments '*:shell:({shells})' ;;
        *) _arguments '--mode=:mode:({names})' {general} ;;
    esac
}}
if [[ ${{funcstack[1]}} == _tl_keras ]]; then  # zsh has loaded this file from fpath, to complete a line
    _tl_keras "$@"
else
    (( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}
    compdef _tl_keras tl_keras
fi
"""


COMPLETION_HELP = """tl_keras completion bash|zsh|fish: print a completion script for the shell

  source <(tl_keras completion bash)
"""


def completion(shell: str) -> str:
    """The completion script of a shell.

    Args:
        shell: `bash`, `zsh` or `fish`.

    Raises:
        UserError: another shell.
    """
    if shell == "bash":
        return _complete_bash()
    if shell == "zsh":
        return _complete_zsh()
    if shell == "fish":
        return _complete_fish()
    fault = f"{shell!r} is not a known shell" if shell else "no shell is named"
    raise UserError(f"completion: {fault}. Allowed: {', '.join(_SHELLS)}.")


def _complete_bash() -> str:
    choices = "\n".join(
        f'        --{field.name}=*) COMPREPLY=($(compgen -W "{" ".join(field.metadata["choices"])}" -- '
        '"${current#*=}")); return ;;'
        for _, field in list_fields()
        if field.metadata["choices"]
    )
    flags = "\n".join(f'        {mode}) words="{" ".join(_list_flags(mode))}" ;;' for mode in MODES)
    paths = "|".join(["--flagfile=*", *(f"--{field.name}=*" for _, field in list_fields() if _takes_path(field))])
    return _BASH.format(
        modes=" ".join(MODES),
        shells=" ".join(_SHELLS),
        choices=choices,
        paths=paths,
        flags=flags,
        general=" ".join(_list_general()),
    )


def _complete_zsh() -> str:
    modes = " ".join(shlex.quote(f"{mode}:{text}") for mode, text in [*MODES.items(), _COMPLETION])
    general = " ".join(shlex.quote(f"{flag}:value:_files" if flag.endswith("=") else flag) for flag in _list_general())
    flags = []
    for mode in MODES:
        own = " ".join(_specify(field) for _, field in list_fields(mode))
        flags.append(f"        {mode}) _arguments '*:word:' {own} {general} ;;")
    return _ZSH.format(
        modes=modes, flags="\n".join(flags), general=general, names=" ".join(MODES), shells=" ".join(_SHELLS)
    )


def _specify(field: dataclasses.Field[Any]) -> str:
    """A flag in the syntax of zsh's `_arguments`."""
    text = "".join(f"\\{one}" if one in "[]:\\" else one for one in _describe(field))
    if isinstance(field.default, bool):
        return shlex.quote(f"--{_name(field)}[{text}]")
    choices = field.metadata["choices"]
    words = f"({' '.join(choices)})" if choices else " "
    action = "_files" if _takes_path(field) else words
    return shlex.quote(f"--{field.name}=[{text}]:{field.name}:{action}")


def _complete_fish() -> str:
    lines = [_FISH]
    for mode, text in [*MODES.items(), _COMPLETION]:
        lines.append(f"complete -c tl_keras -n __fish_use_subcommand -a {mode} -d {_quote_fish(text)}")
    for _, field in list_fields():
        modes, choices = " ".join(field.metadata["modes"]), " ".join(field.metadata["choices"])
        line = (
            f"complete -c tl_keras -n '__tl_keras_mode_is {modes}' -d {_quote_fish(_describe(field))} -l {_name(field)}"
        )
        if not isinstance(field.default, bool):
            words = f" -x -a {_quote_fish(choices)}" if choices else " -x"
            line += " -r -F" if _takes_path(field) else words
        lines.append(line)
    lines.append(f"complete -c tl_keras -n '__fish_seen_subcommand_from completion' -a '{' '.join(_SHELLS)}'")
    lines.append("complete -c tl_keras -l flagfile -d 'read flags from a file' -r -F")
    lines.append("complete -c tl_keras -l help -d 'show the flags of a mode; --help=all shows all of them'")
    lines += [f"complete -c tl_keras -l {name} -d {_quote_fish(text)}" for name, text in GENERAL.items()]
    return "\n".join(lines) + "\n"


def _quote_fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _list_general() -> list[str]:
    return ["--flagfile=", "--help", "--help=all", *(f"--{name}" for name in GENERAL)]


def _list_flags(mode: str) -> list[str]:
    fields = [field for _, field in list_fields(mode)]
    own = [f"--{_name(field)}" + ("" if isinstance(field.default, bool) else "=") for field in fields]
    return own + _list_general()


def _takes_path(field: dataclasses.Field[Any]) -> bool:
    return field.name in PATHS_OR_SOURCES


def _name(field: dataclasses.Field[Any]) -> str:
    """The name of a flag; of a switch, in the form that changes its default."""
    return f"no{field.name}" if field.default is True else field.name


def _describe(field: dataclasses.Field[Any]) -> str:
    return f"turn off: {field.metadata['help']}" if field.default is True else str(field.metadata["help"])
