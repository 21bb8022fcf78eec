-- Accounts: users, registration, profiles and deletion.

-- Users
-- -----

create table public.users (
    id bigint generated always as identity primary key,
    username varchar(64) not null,
    email varchar(254) not null,
    auth_method text not null default 'email',
    role text not null default 'user',
    credits_nanos bigint not null default 0,
    held_nanos bigint not null default 0,
    is_funded boolean not null default false,
    is_active boolean not null default true,
    subscription_status text not null default 'trial',
    trial_expires_at timestamptz,
    preferences jsonb not null default '{}',
    settings jsonb not null default '{}',
    registration_date timestamptz not null default now(),
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    deleted_at timestamptz,
    has_provider_key boolean not null default false,
    has_end_user_budgets boolean not null default false,
    constraint users_never_overdrawn check (0 <= held_nanos and held_nanos <= credits_nanos)
) with (fillfactor = 50); -- room for new versions on the same page: a row is updated twice in a request

-- One function, because PostgreSQL reads the text of a table's checks anew for every statement, and users are
-- updated twice in a request.
create function public.is_sound_user(u public.users) returns boolean language plpgsql immutable as $$
begin
    return u.username <> '' and length(u.email) >= 3
        and u.auth_method in ('email', 'wallet', 'google', 'github')
        and u.role in ('user', 'admin')
        and u.subscription_status in ('trial', 'active', 'expired', 'cancelled')
        and jsonb_typeof(u.preferences) = 'object' and jsonb_typeof(u.settings) = 'object';
end $$;
revoke all on function public.is_sound_user(public.users) from public, anon, authenticated;
grant execute on function public.is_sound_user(public.users) to service_role;
alter table public.users add constraint users_sound check (public.is_sound_user(users));

comment on column public.users.is_funded is
    'True once an admin granted or the user bought credits: pay-as-you-go instead of the free plan''s '
    'limits.';
comment on constraint users_never_overdrawn on public.users is
    'Promise 1: credits never fall below what is held, and what is held never below zero.';
comment on column public.users.has_provider_key is
    'Kept by a trigger: whether there is an active row in provider_keys.';
comment on column public.users.has_end_user_budgets is
    'Kept by a trigger: whether there are rows in end_user_budgets.';
create unique index users_email_key on public.users (lower(email));
comment on index public.users_email_key is 'One account per address, whatever its case.';
create unique index users_username_key on public.users (lower(username));
alter table public.users enable row level security;
revoke all on public.users from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.users to service_role;
revoke all on sequence public.users_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.users_id_seq to service_role;

-- Signup credits
-- --------------

-- Which email addresses have had their signup credits, as HMACs. A user who deletes their account and
-- registers again gets none.
create table public.signup_claims (
    email_hash text primary key check (email_hash ~ '^[0-9a-f]{64}$'),
    claimed_at timestamptz not null default clock_timestamp()
);
comment on table public.signup_claims is
    'HMACs of email addresses, under KEY_HASH_SECRETS: nobody without the secret can tell whose they are.';
alter table public.signup_claims enable row level security;
revoke all on public.signup_claims from public, anon, authenticated, service_role;
grant select, insert on public.signup_claims to service_role;

-- Remembers the address, as its HMAC under the current secret.
create function public.claim_signup(p jsonb) returns void language sql set search_path = '' as $$
    insert into public.signup_claims (email_hash)
    select p -> 'email_hashes' ->> 0 where p -> 'email_hashes' ->> 0 is not null on conflict do nothing
$$;
revoke all on function public.claim_signup(jsonb) from public, anon, authenticated;
grant execute on function public.claim_signup(jsonb) to service_role;

-- Locks on users
-- --------------

-- Locks these users in the order of their ids and returns the ids that it locked: all of them or, where
-- another transaction holds one for longer than lock_timeout, those that are free by then.
create function public.lock_users(p_ids bigint[]) returns bigint[]
language plpgsql set search_path = '' set lock_timeout = '250ms' as $$
declare
    v_locked bigint[];
begin
    begin
        select array_agg(l.id) into v_locked
        from (select u.id from public.users u where u.id = any (p_ids) order by u.id for no key update) as l;
    exception when lock_not_available then
        select array_agg(l.id) into v_locked
        from (select u.id from public.users u where u.id = any (p_ids) order by u.id
              for no key update skip locked) as l;
    end;
    return coalesce(v_locked, '{}');
end $$;
comment on function public.lock_users is
    'A user that stays locked elsewhere must not keep its neighbours in a batch from being served.';
revoke all on function public.lock_users(bigint[]) from public, anon, authenticated;
grant execute on function public.lock_users(bigint[]) to service_role;

-- The key that p names, by its id or by the hashes of its secret.
create function public.target_key(p jsonb) returns bigint language sql stable set search_path = '' as $$
    select coalesce((select k.id from public.api_keys_new k where k.id = (p ->> 'key_id')::bigint),
                    public.find_key(array(select jsonb_array_elements_text(p -> 'hashes'))))
$$;
revoke all on function public.target_key(jsonb) from public, anon, authenticated;
grant execute on function public.target_key(jsonb) to service_role;

-- The user whom p names, by id or by one of their keys. Locked, so that what follows decides on current
-- values.
create function public.lock_target(p jsonb) returns public.users language plpgsql set search_path = '' as $$
declare
    v_id bigint := (p ->> 'user_id')::bigint;
    v_user public.users;
begin
    if v_id is null then
        select k.user_id into v_id from public.api_keys_new k where k.id = public.target_key(p);
    end if;
    select * into v_user from public.users where id = v_id and deleted_at is null for no key update;
    return v_user;
end $$;
revoke all on function public.lock_target(jsonb) from public, anon, authenticated;
grant execute on function public.lock_target(jsonb) to service_role;

-- Locks the user on whose behalf p acts. Null where the account or the acting key has gone since the key was
-- verified.
create function public.lock_orderer(p jsonb) returns bigint language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
begin
    return case when v_maker.user_id = v_user.id then v_user.id end;
end $$;
revoke all on function public.lock_orderer(jsonb) from public, anon, authenticated;
grant execute on function public.lock_orderer(jsonb) to service_role;

-- Registration
-- ------------

-- p: username, email, auth_method, trial_days, signup_nanos, key {...}, mode, address_subject, and
-- email_hashes (under each secret, the current one first). An address that has had signup credits gets none.
-- Outcomes: registered, address_limit, username_taken, email_taken, wrong_mode.
create function public.register_user(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users;
    v_key_id bigint;
    v_nanos bigint := (p ->> 'signup_nanos')::bigint;
    v_constraint text;
begin
    -- A switch to live mode waits for this transaction, or this one for the switch: otherwise the play
    -- credits of a new account would outlive it.
    perform from public.gateway_state where singleton and mode = coalesce(p ->> 'mode', mode) for share;
    if not found then
        return jsonb_build_object('outcome', 'wrong_mode');
    end if;
    -- Counted whatever comes of it, or anybody could ask without end which names and addresses are taken.
    if p ->> 'address_subject' is not null
       and not public.count_address('register:' || (p ->> 'address_subject'), 5) then
        return jsonb_build_object('outcome', 'address_limit');
    end if;
    begin
        insert into public.users (username, email, auth_method, trial_expires_at)
        values (p ->> 'username', p ->> 'email', p ->> 'auth_method',
                clock_timestamp() + make_interval(days => (p ->> 'trial_days')::int))
        returning * into v_user;
    exception when unique_violation then
        get stacked diagnostics v_constraint = constraint_name;
        return jsonb_build_object(
            'outcome', case v_constraint when 'users_email_key' then 'email_taken' else 'username_taken' end);
    end;
    insert into public.rate_limit_usage (subject, subject_id) values ('user', v_user.id);
    v_key_id := public.insert_key(v_user.id, p -> 'key', true);
    if v_nanos > 0 and not exists (
           select from public.signup_claims c
           where c.email_hash in (select jsonb_array_elements_text(p -> 'email_hashes'))) then
        perform public.change_credits(v_user.id, 'grant', v_nanos, 'gateway', 'signup credits', null, null);
        perform public.claim_signup(p);
    end if;
    perform public.write_audit(
        coalesce(p ->> 'actor', 'user:' || v_user.id), 'create', 'user:' || v_user.id, v_user.id, v_key_id,
        p ->> 'address', p ->> 'user_agent', (p ->> 'request_id')::uuid, null);
    select * into v_user from public.users where id = v_user.id;
    return jsonb_build_object(
        'outcome', 'registered', 'user_id', v_user.id, 'key_id', v_key_id,
        'credits_nanos', v_user.credits_nanos, 'subscription_status', v_user.subscription_status,
        'trial_expires_at', v_user.trial_expires_at);
end $$;
revoke all on function public.register_user(jsonb) from public, anon, authenticated;
grant execute on function public.register_user(jsonb) to service_role;

create function public.count_users() returns bigint language sql stable set search_path = '' as $$
    select count(*) from public.users where deleted_at is null
$$;
revoke all on function public.count_users() from public, anon, authenticated;
grant execute on function public.count_users() to service_role;

-- Profile and standing
-- --------------------

-- p: user_id, changes {username, email, preferences, settings}.
-- Outcomes: updated, username_taken, email_taken, too_large, not_found.
create function public.update_profile(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_constraint text;
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_user := jsonb_populate_record(v_user, p -> 'changes');
    if octet_length(v_user.preferences::text) > 16384 or octet_length(v_user.settings::text) > 16384 then
        -- Every request of this user reads and writes the row.
        return jsonb_build_object('outcome', 'too_large');
    end if;
    begin
        update public.users set username = v_user.username, email = v_user.email,
            preferences = v_user.preferences, settings = v_user.settings, updated_at = clock_timestamp()
        where id = v_user.id;
    exception when unique_violation then
        get stacked diagnostics v_constraint = constraint_name;
        return jsonb_build_object(
            'outcome', case v_constraint when 'users_email_key' then 'email_taken' else 'username_taken' end);
    end;
    perform public.write_audit(
        p ->> 'actor', 'update_profile', 'user:' || v_user.id, v_user.id, null, p ->> 'address',
        p ->> 'user_agent',
        (p ->> 'request_id')::uuid,
        jsonb_build_object('fields', (select jsonb_agg(f) from jsonb_object_keys(p -> 'changes') f)));
    return jsonb_build_object('outcome', 'updated');
end $$;
revoke all on function public.update_profile(jsonb) from public, anon, authenticated;
grant execute on function public.update_profile(jsonb) to service_role;

-- For administrators. p: user_id, changes {is_active, role}. Outcomes: set, not_found.
create function public.set_user(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_user := jsonb_populate_record(v_user, p -> 'changes');
    update public.users set is_active = v_user.is_active, role = v_user.role, updated_at = clock_timestamp()
    where id = v_user.id;
    perform public.write_audit(
        p ->> 'actor', 'set_user', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
        (p ->> 'request_id')::uuid, p -> 'changes');
    return jsonb_build_object('outcome', 'set', 'user_id', v_user.id);
end $$;
revoke all on function public.set_user(jsonb) from public, anon, authenticated;
grant execute on function public.set_user(jsonb) to service_role;

-- Deletion
-- --------

-- p: user_id, email_hashes (of the account's address: an account older than signup_claims claims its signup
-- credits now).
-- The row stays, because the books name it; name, address and keys go. Outcomes: deleted, not_found.
create function public.delete_account(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    if exists (select from public.credit_transactions t
               where t.user_id = v_user.id and t.reason = 'signup credits') then
        perform public.claim_signup(p);
    end if;
    update public.api_keys_new set is_active = false, is_primary = false, revoked_at = clock_timestamp(),
        encrypted_key = null, previous_key_hash = null, previous_hash_secret_id = null,
        previous_valid_until = null
    where user_id = v_user.id and revoked_at is null;
    update public.api_keys set is_active = false where user_id = v_user.id;
    update public.user_plans set is_active = false where user_id = v_user.id and is_active;
    perform public.expire_unheld(v_user.id, 'account deleted');
    update public.users set username = 'deleted-' || v_user.id, email = 'deleted-' || v_user.id,
        preferences = '{}', settings = '{}', is_active = false, deleted_at = clock_timestamp(),
        updated_at = clock_timestamp()
    where id = v_user.id;
    perform public.write_audit(
        p ->> 'actor', 'delete', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
        (p ->> 'request_id')::uuid, null);
    return jsonb_build_object('outcome', 'deleted', 'user_id', v_user.id);
end $$;
revoke all on function public.delete_account(jsonb) from public, anon, authenticated;
grant execute on function public.delete_account(jsonb) to service_role;

-- Takes away the credits that no running request holds.
create function public.expire_unheld(p_user_id bigint, p_reason text) returns void
language plpgsql set search_path = '' as $$
declare
    v_unheld bigint;
begin
    select credits_nanos - held_nanos into v_unheld from public.users where id = p_user_id;
    if v_unheld > 0 then
        perform public.change_credits(p_user_id, 'expiry', -v_unheld, 'gateway', p_reason, null, null);
    end if;
end $$;
revoke all on function public.expire_unheld(bigint, text) from public, anon, authenticated;
grant execute on function public.expire_unheld(bigint, text) to service_role;

-- What running requests still held of a deleted account leaves it as they are settled.
create function public.expire_rest_of_deleted() returns trigger language plpgsql set search_path = '' as $$
begin
    perform public.expire_unheld(new.id, 'account deleted');
    return null;
end $$;
revoke all on function public.expire_rest_of_deleted() from public, anon, authenticated;
grant execute on function public.expire_rest_of_deleted() to service_role;

create trigger users_deleted_keep_nothing after update of held_nanos on public.users
    for each row when (new.deleted_at is not null and new.credits_nanos > new.held_nanos)
    execute function public.expire_rest_of_deleted();

create function public.forget_account() returns trigger language plpgsql set search_path = '' as $$
begin
    delete from public.provider_keys where user_id = new.id;
    delete from public.webhooks where user_id = new.id;
    delete from public.budget_events where user_id = new.id;
    delete from public.end_user_budgets where user_id = new.id;
    delete from public.end_user_usage where user_id = new.id;
    delete from public.stored_answers where user_id = new.id;
    return null;
end $$;
comment on function public.forget_account is
    'Secrets, addresses, names of customers and answers of a deleted account go with it.';
revoke all on function public.forget_account() from public, anon, authenticated;
grant execute on function public.forget_account() to service_role;

create trigger users_deleted_forget after update of deleted_at on public.users
    for each row when (old.deleted_at is null and new.deleted_at is not null)
    execute function public.forget_account();
