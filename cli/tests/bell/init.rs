//! `bell cluster init` and the contexts, without any server.

use std::os::unix::fs::PermissionsExt;

use crate::support::Lab;
use bellwether_member::MemberConfig;

#[test]
fn init_makes_a_cluster_and_its_context() {
    let lab = Lab::new();
    let base = lab.base.path().display().to_string();
    let line = |storage: &str| {
        format!(
            "cluster init --data-dir {base}/new --address 127.0.0.2 --name beta \
             --cluster-name second --storage {base}/{storage} --api-port 7500 -o json"
        )
    };
    let taken = lab.bell(&line("storage"));
    assert_eq!(taken.code, 4, "{taken:?}");
    assert!(taken.stderr.contains("remedy: give a directory of its own"), "{taken:?}");
    std::fs::create_dir(lab.base.path().join("second")).unwrap();
    let line = line("second");
    let made = lab.bell(&line);
    assert_eq!(made.code, 0, "{made:?}");
    let json = made.json();
    assert_eq!(json["endpoint"], "127.0.0.2:7500");
    assert_eq!(json["next"], format!("bellwether-controller run --data-dir {base}/new"));
    let config = MemberConfig::load(format!("{base}/new").as_ref()).unwrap();
    assert_eq!((config.name.as_str(), config.ports.api, config.ports.raft), ("beta", 7500, 7401));
    let mode = std::fs::metadata(lab.config()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let context = lab.bell("context show -o json").json();
    assert_eq!((&context["name"], &context["current"]), (&"second".into(), &true.into()));
    assert_eq!(context["endpoints"][0], "127.0.0.2:7500");

    let again = lab.bell(&line);
    assert_eq!(again.code, 4, "{again:?}");
    assert!(again.stderr.contains("`second` exists"), "{again:?}");
    let used = lab.bell(&format!("{line} --context third"));
    assert_eq!(used.code, 4, "{used:?}");
    assert!(used.stderr.contains("already holds a member"), "{used:?}");
    assert_eq!(lab.bell("context list -o json").json().as_array().unwrap().len(), 1);
}

#[test]
fn init_never_makes_the_storage() {
    let lab = Lab::new();
    let base = lab.base.path().display().to_string();
    let refused = lab.bell(&format!(
        "cluster init --data-dir {base}/new --address 127.0.0.2 --name beta --storage {base}/unmounted"
    ));
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(refused.stderr.contains("remedy: mount the shared storage first"), "{refused:?}");
    assert!(!lab.base.path().join("unmounted").exists() && !lab.base.path().join("new").exists());
}

#[test]
fn contexts_are_added_chosen_and_removed() {
    let lab = Lab::new();
    let empty = lab.bell("vm list");
    assert_eq!(empty.code, 2, "{empty:?}");
    assert!(empty.stderr.contains("remedy: "), "{empty:?}");
    let identity = lab.report.admin.dir.display();
    for name in ["one", "two"] {
        let added = lab
            .bell(&format!("context add {name} --endpoint 127.0.0.1:7400 --identity {identity}"));
        assert_eq!(added.code, 0, "{added:?}");
    }
    assert_eq!(lab.bell("context show -o json").json()["name"], "one");
    assert_eq!(lab.bell("context use two").code, 0);
    assert_eq!(lab.bell("context show -o json").json()["name"], "two");
    assert_eq!(lab.bell("context use three").code, 3);
    assert_eq!(lab.bell("context remove two").code, 0);
    assert_eq!(lab.bell("context show").code, 2);
    let wrong = lab.bell("context add bad --endpoint 127.0.0.1:7400 --identity /nowhere");
    assert_eq!(wrong.code, 7, "{wrong:?}");
}

#[test]
fn help_and_completions_are_there() {
    let lab = Lab::new();
    let help = lab.bell("--help");
    assert_eq!(help.code, 0);
    assert!(help.stdout.contains("6  the outcome is unknown"), "{}", help.stdout);
    assert!(lab.bell("completions bash").stdout.contains("confirm-down"));
    assert_eq!(lab.bell("vm frobnicate").code, 2);
}
