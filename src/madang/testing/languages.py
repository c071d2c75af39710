"""What each language is tried with: the matrix of the tests and of the documentation."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Final

from madang.kit.languages import Languages, version_command


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Pieces of code of one language. Cells that are empty are not tried."""

    code: str
    """Prints ``6 ü ARGUMENT`` and a newline, its first argument, or ``6 ü``; ends well."""
    arguments: bool = True
    """Whether *code* is given arguments."""
    file: str
    """Prints its argument and a newline, ends with 3."""
    broken: str
    """A file whose third line is wrong, when it is built or when it runs."""
    set: str = ""
    """Cell: keeps 20 under a name."""
    get: str = ""
    """Cell: what was kept and one more, as the value of an expression."""
    got: str = "21"
    print: str = ""
    """Cell: prints ``hä`` and a newline, and ``oh`` on standard error."""
    wrong: str = ""
    """Cell: fails in its third line."""
    ask: str = ""
    """Cell: reads a line and prints ``hello LINE``."""
    loop: str = ""
    """Cell: never ends."""
    large: str = ""
    """Cell: prints 300,000 times ``0123456789``, with or without line breaks."""
    name: str = ""
    """The beginning of a name, to be completed."""
    names: str = ""
    """One that is among its completions."""


_LARGE_C: Final = 'for (int i = 0; i < 300000; i++) fputs("0123456789", stdout);'

SAMPLES: Final = {
    "python": Samples(
        code='import sys; print(2 * 3, "ü", *sys.argv[1:])',
        file="import sys\nprint(sys.argv[1])\nsys.exit(3)\n",
        broken="x = 1\n\nnope()\n",
        set="x = 20",
        get="x + 1",
        print="import sys\nprint('hä')\nprint('oh', file=sys.stderr)",
        wrong="y = 1\n\nnope()",
        ask="print('hello', input('who? '))",
        loop="while True: pass",
        large="print('0123456789' * 300000)",
        name="prin",
        names="print",
    ),
    "shell": Samples(
        code='echo "$((2 * 3)) ü $1"',
        file='echo "$1"\nexit 3\n',
        broken="set -e\n\nnope\n",
        set="x=20",
        get="echo $((x + 1))",
        print="echo hä\necho oh >&2",
        wrong="y=1\n\nnope",
        ask='read name; echo "hello $name"',
        loop="while :; do :; done",
        large="for i in $(seq 3000); do printf '0123456789%.0s' $(seq 100); done",
        name="basenam",
        names="basename",
    ),
    "r": Samples(
        code='cat(2 * 3, "ü", commandArgs(TRUE), "\\n")',
        file='cat(commandArgs(TRUE)[1], "\\n", sep = "")\nquit(status = 3)\n',
        broken="x <- 1\n\nnope()\n",
        set="x <- 20",
        get="x + 1",
        got="[1] 21",
        print='cat("hä\\n")\nmessage("oh")',
        wrong="y <- 1\n\nnope()",
        ask='cat("hello", readline("who? "), "\\n")',
        loop="while (TRUE) {}",
        large='for (i in 1:300) cat(rep("0123456789", 1000), sep = "")',
        name="read.cs",
        names="read.csv",
    ),
    "php": Samples(
        code='echo 2 * 3, " ü ", $argv[1], "\\n";',
        file='<?php\necho $argv[1], "\\n";\nexit(3);\n',
        broken="<?php\n\nnope();\n",
        set="$x = 20;",
        get="$x + 1",
        print='echo "hä\\n";\nfwrite(STDERR, "oh\\n");',
        wrong="$y = 1;\n\nnope();",
        ask='echo "hello ", fgets(STDIN);',
        loop="while (true) {}",
        large='for ($i = 0; $i < 300000; $i++) echo "0123456789";',
        name="str_rep",
        names="str_replace",
    ),
    "node": Samples(
        code='console.log(2 * 3, "ü", process.argv[1])',
        file="console.log(process.argv[2])\nprocess.exit(3)\n",
        broken="let x = 1\n\nnope()\n",
        set="const x = 20",
        get="x + 1",
        print='console.log("hä")\nconsole.error("oh")',
        wrong="let y = 1\n\nnope()",
        ask='console.log("hello " + prompt("who? "))',
        loop="while (true) {}",
        large='for (let i = 0; i < 300; i++) process.stdout.write("0123456789".repeat(1000))',
        name="console.lo",
        names="console.log",
    ),
    "typescript": Samples(
        code='const n: number = 2 * 3; console.log(n, "ü", process.argv[2])',
        file="const word: string = process.argv[2]\nconsole.log(word)\nprocess.exit(3)\n",
        broken="let x = 1\n\nx = 'two'\n",
        set="const x: number = 20",
        get="x + 1",
        print='console.log("hä" as string)\nconsole.error("oh")',
        wrong="let y: number = 1\n\nnope()",
        ask='console.log("hello " + prompt("who? "))',
        loop="while (true) {}",
        large='for (let i = 0; i < 300; i++) process.stdout.write("0123456789".repeat(1000))',
        name="console.lo",
        names="console.log",
    ),
    "lua": Samples(
        code='print(2 * 3 .. " ü " .. arg[1])',
        file="print(arg[1])\nos.exit(3)\n",
        broken="local x = 1\n\nnope()\n",
        set="x = 20",
        get="x + 1",
        print='print("hä")\nio.stderr:write("oh\\n")',
        wrong="y = 1\n\nnope()",
        ask='print("hello " .. io.read())',
        loop="while true do end",
        large='for i = 1, 300 do io.write(("0123456789"):rep(1000)) end',
        name="string.fo",
        names="format",
    ),
    "ruby": Samples(
        code='puts "#{2 * 3} ü #{ARGV[0]}"',
        file="puts ARGV[0]\nexit 3\n",
        broken="x = 1\n\nnope()\n",
        set="x = 20",
        get="x + 1",
        print='puts "hä"\nwarn "oh"',
        wrong="y = 1\n\nnope()",
        ask='puts "hello #{gets}"',
        loop="loop {}",
        large='300.times { print "0123456789" * 1000 }',
        name="x.ti",
        names="times",
    ),
    "perl": Samples(
        code='print 2 * 3, " ü $ARGV[0]\\n"',
        file='print "$ARGV[0]\\n";\nexit 3;\n',
        broken="my $x = 1;\n\nnope();\n",
        set="my $x = 20;",
        get="$x + 1",
        print='print "hä\\n";\nprint STDERR "oh\\n";',
        wrong="my $y = 1;\n\nnope();",
        ask='print "hello " . <STDIN>;',
        loop="1 while 1;",
        large='print "0123456789" x 1000 for 1 .. 300;',
        name="$x",
        names="$x",
    ),
    "java": Samples(
        code='System.out.println(2 * 3 + " ü " + args[0]);',
        file=(
            "class Main {\n  public static void main(String[] a) {\n"
            "    System.out.println(a[0]);\n    System.exit(3);\n  }\n}\n"
        ),
        broken="class Main {\n  public static void main(String[] a) {\n    nope();\n  }\n}\n",
        set="int x = 20;",
        get="x + 1",
        print='System.out.println("hä");\nSystem.err.println("oh");',
        wrong="int y = 1;\n\nint z = y / 0;",
        ask='System.out.println("hello " + new Scanner(System.in).nextLine());',
        loop="while (true) {}",
        large='for (int i = 0; i < 300; i++) System.out.print("0123456789".repeat(1000));',
        name="Math.ma",
        names="max(",
    ),
    "c": Samples(
        code='printf("%d ü %s\\n", 2 * 3, argv[1]);',
        file=(
            "#include <stdio.h>\nint main(int argc, char **argv) {\n"
            "  puts(argv[1]);\n  return 3;\n}\n"
        ),
        broken="int main(void) {\n  int x = 1;\n  return nope;\n}\n",
        print='puts("hä");\nfputs("oh\\n", stderr);',
        wrong="int y = 1;\n\ny = nope;",
        loop="for (;;) {}",
        large=_LARGE_C,
    ),
    "cpp": Samples(
        code='cout << 2 * 3 << " ü " << argv[1] << endl;',
        file=(
            "#include <iostream>\nint main(int argc, char **argv) {\n"
            "  std::cout << argv[1] << std::endl;\n  return 3;\n}\n"
        ),
        broken="int main() {\n  int x = 1;\n  return nope;\n}\n",
        print='cout << "hä" << endl;\ncerr << "oh" << endl;',
        wrong="int y = 1;\n\ny = nope;",
        loop="for (;;) {}",
        large=_LARGE_C,
    ),
    "go": Samples(
        code='fmt.Println(2*3, "ü", os.Args[1])',
        file=(
            'package main\nimport ("fmt"; "os")\nfunc main() {\n'
            "  fmt.Println(os.Args[1])\n  os.Exit(3)\n}\n"
        ),
        broken="package main\nfunc main() {\n  nope()\n}\n",
        print='fmt.Println("hä")\nfmt.Fprintln(os.Stderr, "oh")',
        wrong="y := 1\n\ny = nope",
        loop="for {}",
        large='for i := 0; i < 300; i++ { fmt.Print(strings.Repeat("0123456789", 1000)) }',
    ),
    "rust": Samples(
        code='println!("{} ü {}", 2 * 3, std::env::args().nth(1).unwrap());',
        file=(
            'fn main() {\n  println!("{}", std::env::args().nth(1).unwrap());\n'
            "  std::process::exit(3);\n}\n"
        ),
        broken="fn main() {\n  let x = 1;\n  nope(x);\n}\n",
        print='println!("hä");\neprintln!("oh");',
        wrong="let y = 1;\n\nnope(y);",
        loop="loop {}",
        large='for _ in 0..300 { print!("{}", "0123456789".repeat(1000)); }',
    ),
    "csharp": Samples(
        code='Console.WriteLine(2 * 3 + " ü " + args[0]);',
        file=(
            "class P {\n  static int Main(string[] a) {\n"
            "    System.Console.WriteLine(a[0]);\n    return 3;\n  }\n}\n"
        ),
        broken="class P {\n  static void Main() {\n    nope();\n  }\n}\n",
        print='Console.WriteLine("hä");\nConsole.Error.WriteLine("oh");',
        wrong="int y = 1;\n\ny = nope;",
        loop="for (;;) {}",
        large='for (int i = 0; i < 300000; i++) Console.Write("0123456789");',
    ),
    "swift": Samples(
        code='print(2 * 3, "ü", CommandLine.arguments[1])',
        file="import Foundation\nprint(CommandLine.arguments[1])\nexit(3)\n",
        broken="let x = 1\n\nnope(x)\n",
        print='import Foundation\nprint("hä")\nfputs("oh\\n", stderr)',
        wrong="let y = 1\n\nnope(y)",
        loop="while true {}",
        large='for _ in 0..<300 { print(String(repeating: "0123456789", count: 1000)) }',
    ),
    "haskell": Samples(
        code='putStrLn (show (2 * 3) ++ " ü")',
        arguments=False,
        file=(
            "import System.Environment\nimport System.Exit\n"
            "main = do { [a] <- getArgs; putStrLn a; exitWith (ExitFailure 3) }\n"
        ),
        broken="x = 1\n\nmain = nope x\n",
        set="x = 20",
        get="x + 1",
        print='import System.IO\nputStrLn "hä"\nhPutStrLn stderr "oh"',
        wrong="let y = 1\n\nnope y",
        ask='getLine >>= putStrLn . ("hello " ++)',
        loop="last [1..]",
        large='mapM_ (const (putStr (concat (replicate 1000 "0123456789")))) [1..300]',
        name="mapM",
        names="mapM_",
    ),
    "octave": Samples(
        code='printf("%d ü %s\\n", 2 * 3, argv(){end})',
        file='printf("%s\\n", argv(){end});\nexit(3);\n',
        broken="x = 1;\n\nnope();\n",
        set="x = 20;",
        get="x + 1",
        got="ans = 21",
        print='printf("hä\\n");\nfprintf(stderr, "oh\\n");',
        wrong="y = 1;\n\nnope();",
        ask='printf("hello %s\\n", input("who? ", "s"));',
        loop="while true, end",
        large='for i = 1:300, printf("%s", repmat("0123456789", 1, 1000)); end',
        name="strspl",
        names="strsplit",
    ),
    "julia": Samples(
        code='println(2 * 3, " ü ", ARGS[1])',
        file="println(ARGS[1])\nexit(3)\n",
        broken="x = 1\n\nnope()\n",
        set="x = 20",
        get="x + 1",
        print='println("hä")\nprintln(stderr, "oh")',
        wrong="y = 1\n\nnope()",
        ask='println("hello ", readline())',
        loop="while true; sleep(0.001); end",
        large='for i in 1:300 print("0123456789"^1000) end',
        name="printl",
        names="println",
    ),
}


ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}
"""As a session of the host image has it."""


def found_here() -> dict[str, str]:
    """Languages of this machine with their versions."""
    languages = Languages()
    command = version_command(languages.all())
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120
    )
    lines = [line.partition("\t") for line in done.stdout.splitlines()]
    return {name: version.strip() for name, _, version in lines}
